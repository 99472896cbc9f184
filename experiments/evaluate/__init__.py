"""Anyone's samples against anyone's reference: FID and what is quoted beside it."""
