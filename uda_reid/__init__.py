"""Unsupervised domain adaptation of person re-identification.

Shape letters, used in every docstring of the package:

    B  images in a batch (B = P * K)       N  images in a bank
    P  identities in a batch               Q  queries
    K  instances of each identity          G  gallery images
    C  channels                            D  embedding size
    H  rows of an image or a map           M  clusters or classes
    W  columns of an image or a map        L  stacked blocks
"""

__version__ = "0.1.0"
