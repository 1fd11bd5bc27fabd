"""Small trainable parts on a backbone: heads, low-rank changes of its weights, and the loop that fits them."""
