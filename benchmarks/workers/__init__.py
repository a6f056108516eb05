"""What runs in processes of its own: each framework's training."""
