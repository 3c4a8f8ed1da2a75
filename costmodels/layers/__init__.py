"""What one layer, the embedding and the LM head take and store, per micro-batch on one rank; one file per part."""

__all__: list[str] = []
