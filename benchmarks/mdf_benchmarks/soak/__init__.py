"""`mdf soak`: an engine under many callers in, every call accounted for out."""
