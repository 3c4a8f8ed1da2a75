# shellcheck shell=bash
# Environment of every rank.
# Nothing needs to be set for this plan.
