"""Rendered pedestrian domains: labelled data with a known domain gap, for tests, demonstrations and comparisons."""

from uda_reid.synthetic.domains import DOMAINS, Domain
from uda_reid.synthetic.writer import write_domain

__all__ = ["DOMAINS", "Domain", "write_domain"]
