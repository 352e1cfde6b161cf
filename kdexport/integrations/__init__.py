"""Artifacts in other runtimes: Triton, Kubernetes and KServe, Ray Serve."""
