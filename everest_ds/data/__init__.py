"""Videos to clips: manifests, decoding, sampling, crops, batches, and a generator of synthetic motion videos.

Nothing is imported here, so that writing synthetic videos or reading a manifest doesn't load torch.
"""
