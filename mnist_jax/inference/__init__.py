"""What saved runs are used for: predict, evaluate, compare, export, verify, draw."""
