"""Methods that were fitted to the embedded models, one in each folder; see its README."""
