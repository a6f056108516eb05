"""How a run is shown: console, figures, report, TensorBoard, profiler."""
