"""Refinement: from class maps and seeds to pseudo masks that follow the image's edges.

:mod:`lpcam.refine.crf` is the fully connected conditional random field, :mod:`lpcam.refine.pamr`
the pixel-adaptive refinement by local affinities.
"""
