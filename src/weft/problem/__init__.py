"""What is trained: nodes, terms, losses, and problems made of them."""
