# The regression of port_from_r.R in PyTorch, line for line.

import torch
from torch import nn

from explicit_wn import WeightNorm


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.wn = WeightNorm("weight", dim=1)  # Python counts dimensions from 0
        self.fc = nn.Linear(20, 40)
        self.wn.apply(self.fc)
        self.wn_whole = WeightNorm("weight", dim=None)
        self.out = nn.Linear(40, 1)
        self.wn_whole.apply(self.out)

    def forward(self, x):
        self.wn.recompute(self.fc)
        self.wn_whole.recompute(self.out)
        return self.out(torch.relu(self.fc(x)))


torch.manual_seed(1)
x = torch.randn(64, 20)
y = torch.sin(torch.sum(x, dim=1, keepdim=True) / 4)

net = Net()
optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
for _ in range(200):
    loss = nn.functional.mse_loss(net(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

print("loss:", loss.item())
print("shape of g:", *net.fc.weight_g.shape)
print("shape of v:", *net.fc.weight_v.shape)

net.wn.remove(net.fc)
print("parameters:", *dict(net.fc.named_parameters()))
