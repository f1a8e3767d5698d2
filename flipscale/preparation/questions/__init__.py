"""Questions about images with their answers, made beforehand."""
