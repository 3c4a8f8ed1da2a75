"""What plans mean and how time passes; knows no cost formula."""

__all__: list[str] = []
