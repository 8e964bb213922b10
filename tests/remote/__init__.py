"""A basin in a bucket, from end to end: what it costs, who shares it, what goes wrong on the way."""
