"""A small, real serving loop over paged hybrid caches."""
