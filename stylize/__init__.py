"""Neural style transfer: by optimisation, by fast networks, of movies."""
