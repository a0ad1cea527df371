"""Training a model that is split over several devices: micro-batches follow one another through its stages."""
