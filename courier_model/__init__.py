"""Builds, trains, saves and uses the image encoder; knows torch, not Beam, faiss or click."""
