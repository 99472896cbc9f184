"""Folders of colour images end to end: autoencoder, latent cache, DiT, samples, measures."""
