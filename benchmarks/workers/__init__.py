"""What runs in a process of its own, to be measured: each framework's training, and `train.py`."""
