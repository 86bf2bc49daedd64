"""What a request must pass before the API sees it: connections and their limits, paths, keys, sizes of bodies."""
