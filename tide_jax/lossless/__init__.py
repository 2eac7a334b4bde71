"""Drafts and their verification by the full model."""
