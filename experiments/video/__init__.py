"""Video: an autoencoder of clips, a diffusion of their latents, clips drawn and measured."""
