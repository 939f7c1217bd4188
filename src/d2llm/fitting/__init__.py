"""From documents alone to a search engine that has learnt them."""
