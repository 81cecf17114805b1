"""The doctor: can this machine train, with what, and what to fix. Its checks are the rows of :mod:`.checks`.

Nothing but the checks themselves imports torch, DeepSpeed or any other package: it must speak where they are broken.
"""
