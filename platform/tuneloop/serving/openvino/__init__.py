"""OpenVINO's compiled models under our own engine: same scheduler, faster steps on a CPU."""
