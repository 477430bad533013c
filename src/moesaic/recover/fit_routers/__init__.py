"""The router's fit: every layer's router is corrected to the experts that are left, without training."""
