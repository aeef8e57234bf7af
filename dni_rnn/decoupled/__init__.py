"""Parts of a net in processes of their own, which do not wait for each other's gradients."""
