"""Those who look on while a weight is computed: compilers and transforms, and TorchScript. Each goes in one piece."""
