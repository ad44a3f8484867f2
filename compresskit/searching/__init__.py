"""The search stage: spend every byte of a low-bit model where it counts most."""
