"""HOW TEXT COMES OUT: the base model, per-row LoRA in its layers, the decoding loop."""
