"""Keep to the limits of servers that answer 429 or 503, together with the other processes that use the same cache."""
