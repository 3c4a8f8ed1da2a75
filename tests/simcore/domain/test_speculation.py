import pytest

from meshwright.errors import SpecError
from meshwright.simcore.domain.serving import ServingPool
from meshwright.simcore.domain.speculation import Acceptance


def test_a_rate_says_the_lengths_of_every_draft():
    half = Acceptance(rate=0.5)
    assert half.step_token_probabilities(0) == (1.0,)
    assert half.step_token_probabilities(2) == (0.5, 0.25, 0.25)
    # Leviathan et al. 2022 (arXiv 2211.17192), equation 1.
    assert Acceptance(rate=0.8).tokens_per_step(3) == pytest.approx((1 - 0.8**4) / (1 - 0.8))
    assert Acceptance(rate=1.0).tokens_per_step(3) == 4.0
    assert Acceptance(rate=0.0).tokens_per_step(3) == 1.0


def test_a_shorter_draft_ends_where_a_longer_one_would_have_gone_on():
    measured = Acceptance(lengths=(0.3, 0.4, 0.3))
    assert measured.longest_draft == 2
    assert measured.tokens_per_step(2) == pytest.approx(2.0)
    assert measured.step_token_probabilities(1) == pytest.approx((0.3, 0.7))
    assert measured.step_token_probabilities(0) == pytest.approx((1.0,))
    # The rate's own lengths, cut, are those of the rate.
    long = Acceptance(lengths=Acceptance(rate=0.6).step_token_probabilities(4))
    assert long.step_token_probabilities(2) == pytest.approx(Acceptance(rate=0.6).step_token_probabilities(2))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"acceptance_rate": 1.5}, "acceptance_rate: is a chance from 0 to 1"),
        (
            {"acceptance_lengths": (0.5, 0.4), "num_speculative_tokens": 1},
            "which sum to 1; 0.5, 0.4 sum to 0.9",
        ),
        ({"acceptance_lengths": (0.5, 0.3, 0.2), "num_speculative_tokens": 1}, "of at least 2, not 1"),
    ],
)
def test_what_is_no_probability_is_refused(said, message):
    with pytest.raises(SpecError, match=message):
        ServingPool(**said)
