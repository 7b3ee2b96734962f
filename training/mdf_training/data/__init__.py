"""Cases in: folders, public layouts, splits, checks, and the pixels that a model sees."""
