"""CMMLU: 67 Chinese subjects, four choices, five dev rows a subject as shots; C-Eval's prompt with CMMLU's own first line.

Not in the 2023 kit. The authors' `China specific` cuts across the other categories, so it is a group beside them.
"""
from rlhfkit.tasks.exam import LETTERS, ask_exam, load_exam
from rlhfkit.tasks.task import Task, template

CATEGORIES = {
    "STEM": (
        "astronomy=天文学 conceptual_physics=概念物理学 high_school_physics=高中物理学 high_school_chemistry=高中化学 "
        "anatomy=解剖学 genetics=遗传学 high_school_biology=高中生物 virology=病毒学 computer_science=计算机科学 "
        "machine_learning=机器学习 college_actuarial_science=大学精算学 college_mathematics=大学数学 "
        "elementary_mathematics=初等数学 high_school_mathematics=高中数学 college_engineering_hydrology=大学工程水文学 "
        "electrical_engineering=电气工程 college_medical_statistics=大学医学统计"),
    "Humanities": (
        "chinese_history=中国历史 world_history=世界历史 logical=逻辑学 marxist_theory=马克思主义理论 philosophy=哲学 "
        "college_law=大学法律 international_law=国际法学 jurisprudence=法理学 professional_law=专业法学 arts=艺术学 "
        "chinese_literature=中国文学 global_facts=全球事实 world_religions=世界宗教"),
    "Social Science": (
        "ancient_chinese=古汉语 elementary_chinese=小学语文 modern_chinese=现代汉语 business_ethics=商业伦理 management=管理学 "
        "marketing=市场营销 professional_accounting=专业会计 chinese_civil_service_exam=中国公务员考试 "
        "chinese_foreign_policy=中国外交政策 high_school_politics=高中政治 public_relations=公共关系 security_study=安全研究 "
        "chinese_food_culture=中国饮食文化 ethnology=民族学 sociology=社会学 economics=经济学 high_school_geography=高中地理 "
        "professional_psychology=专业心理学 chinese_teacher_qualification=中国教师资格 college_education=大学教育学 "
        "education=教育学 journalism=新闻学"),
    "Other": (
        "agronomy=农学 chinese_driving_rule=中国驾驶规则 clinical_knowledge=临床知识 college_medicine=大学医学 "
        "computer_security=计算机安全 construction_project_management=建设工程管理 elementary_commonsense=小学常识 "
        "elementary_information_and_technology=小学信息技术 food_science=食品科学 human_sexuality=人类性行为 "
        "legal_and_moral_basis=法律与道德基础 nutrition=营养学 professional_medicine=专业医学 sports_science=体育学 "
        "traditional_chinese_medicine=中医中药"),
}
CHINA = (
    "ancient_chinese chinese_civil_service_exam chinese_driving_rule chinese_food_culture chinese_foreign_policy "
    "chinese_history chinese_literature chinese_teacher_qualification construction_project_management "
    "elementary_chinese elementary_commonsense ethnology high_school_politics modern_chinese "
    "traditional_chinese_medicine").split()
NAMES = dict(pair.split("=") for subjects in CATEGORIES.values() for pair in subjects.split())
SUBJECTS = {pair.split("=")[0]: category for category, subjects in CATEGORIES.items() for pair in subjects.split()}
LAYOUT = "cmmlu/{dev,test}/<subject>.csv with a header: (no name),Question,A,B,C,D,Answer"


def load(folder, split):
    return load_exam(folder, split, SUBJECTS, ("Question", *LETTERS, "Answer"), True, LAYOUT, ".csv", {"China specific": CHINA})


def intro(example):
    return f"以下是关于{NAMES[example['subject']]}的单项选择题，请直接给出正确答案的选项。"


TASK = Task("cmmlu", load, template(ask_exam("答案："), "\n\n", intro), "letters", split="test", shot_splits=("dev",))
