"""What a finished adapter did to its base, as numbers (spectrum) and as a picture (picture)."""

from .spectrum import LayerSpectrum, spectra

__all__ = ["LayerSpectrum", "spectra"]
