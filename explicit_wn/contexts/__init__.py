"""Those who look on while a weight is computed: compilers and transforms, and TorchScript. Each in one piece."""
