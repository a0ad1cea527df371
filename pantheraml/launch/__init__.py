"""Who started this process, which rank it is, and how the other ranks are started; knows nothing of models."""
