"""MNIST end to end: autoencoder with discriminator, latent DiT, samples, measures, pictures."""
