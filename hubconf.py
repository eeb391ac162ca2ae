"""torch.hub's door: torch.hub.load(FOLDER, "student", source="local", path="docs/student.pt")."""

from model import Student, load_student

dependencies = ["torch", "numpy", "PIL", "einops", "tqdm"]


def student(path: str, **options) -> Student:
    """A student of any file or folder that `model.load_student` reads, and with its options."""
    return load_student(path, **options)
