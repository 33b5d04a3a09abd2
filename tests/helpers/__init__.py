"""What tests share: tiny models, fakes, samples, and the command line as tests run it. Tests never import one another."""
