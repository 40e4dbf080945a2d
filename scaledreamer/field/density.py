import torch
def volsdf_density(sdf, beta):
    s=1/beta
    return s*(0.5-0.5*sdf.sign()*(-torch.expm1(-sdf.abs()*s)))
