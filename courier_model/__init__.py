"""The image encoder: built, trained, saved and used. Knows torch, not Beam, faiss or click."""
