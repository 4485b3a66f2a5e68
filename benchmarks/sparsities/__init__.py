"""What benchmarks of activation sparsity share."""
