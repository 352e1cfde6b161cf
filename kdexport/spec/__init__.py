"""The spec: every setting, declared once with its type, default, unit and help.

A spec comes from a YAML file and from flags, which win. Unknown keys, values out of range, and keys without an effect
are errors that name the key. `None` is derived later, with the reason (`kdexport run --plan`).
"""

from kdexport.spec.checks import losses_of as losses_of
from kdexport.spec.checks import several_students as several_students
from kdexport.spec.checks import weights_of as weights_of
from kdexport.spec.read import commented as commented
from kdexport.spec.read import dump as dump
from kdexport.spec.read import load as load
from kdexport.spec.read import parse as parse
from kdexport.spec.read import parse_bench as parse_bench
from kdexport.spec.read import read_yaml as read_yaml
from kdexport.spec.read import settings as settings
from kdexport.spec.read import walk as walk
from kdexport.spec.sections import Augment as Augment
from kdexport.spec.sections import Bench as Bench
from kdexport.spec.sections import Budget as Budget
from kdexport.spec.sections import Data as Data
from kdexport.spec.sections import Distill as Distill
from kdexport.spec.sections import Export as Export
from kdexport.spec.sections import Precision as Precision
from kdexport.spec.sections import Schedule as Schedule
from kdexport.spec.sections import Spec as Spec
from kdexport.spec.sections import Student as Student
from kdexport.spec.sections import Teacher as Teacher
from kdexport.spec.sections import TeacherTraining as TeacherTraining
from kdexport.spec.sections import Weight as Weight
