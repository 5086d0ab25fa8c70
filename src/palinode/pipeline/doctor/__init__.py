"""Will it work here? What is installed, what the machine has, and the pre-flight of a run."""

from palinode.pipeline.doctor.equipment import examine_equipment
from palinode.pipeline.doctor.findings import DoctorFinding
from palinode.pipeline.doctor.run import examine_run

__all__ = ["DoctorFinding", "examine_equipment", "examine_run"]
