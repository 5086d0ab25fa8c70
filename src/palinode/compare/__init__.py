"""A fair comparison of methods: the same rows, budget and search, one rule, measured once."""
