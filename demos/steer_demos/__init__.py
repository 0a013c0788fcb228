"""What a person runs and looks at: the embedded models, generation, evaluation and training."""
