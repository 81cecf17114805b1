"""The networks: token selection, the masked autoencoder, the classifier, and their weights."""

from everest_ds.models.autoencoder import MaskedAutoencoder, Reconstruction
from everest_ds.models.classifier import VideoClassifier
from everest_ds.models.flops import done_macs, forward_backward_macs, forward_macs
from everest_ds.models.registry import build_network, create_model
from everest_ds.models.weights import load_pretrained

__all__ = [
    "MaskedAutoencoder",
    "Reconstruction",
    "VideoClassifier",
    "build_network",
    "create_model",
    "done_macs",
    "forward_backward_macs",
    "forward_macs",
    "load_pretrained",
]
