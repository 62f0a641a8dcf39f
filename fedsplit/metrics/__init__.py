"""What is measured: quality of the model, memory and FLOPs of its parts."""
