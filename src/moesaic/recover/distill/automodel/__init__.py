"""NeMo AutoModel: global distillation, and the model class with which it trains children on clusters."""
